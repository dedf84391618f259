"""Encodings: experts kept in codes of 4 or 8 bits, exactly as their checkpoint stores them.

encoding       the contract: parts of a coded matrix, and what they decode to
coded          the coded parameters of an expert
stored_matrix  a coded matrix as a checkpoint keeps it
"""
