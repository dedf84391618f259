"""Decoding speed of an offloaded model beside other systems."""
