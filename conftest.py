"""For the tests of kerneltest itself: ``pytester`` runs whole pytest sessions in a child process."""

pytest_plugins = ["pytester"]
