"""Detection power: what the oracle finds in a corpus of planted mistakes, beside what the usual checkers find."""
