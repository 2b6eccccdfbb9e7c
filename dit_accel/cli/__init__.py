"""The command line: ``dit-accel generate``, ``bench`` and ``info``."""
