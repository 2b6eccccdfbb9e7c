"""In which order tokens form blocks."""
