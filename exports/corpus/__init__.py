"""Corpus of text from Debian, PyPI and npm packages, with the sources and licences of all of it."""
