"""The parent's side of the wall: draws cases, survives what they do, shrinks what it finds. Never imports torch."""
