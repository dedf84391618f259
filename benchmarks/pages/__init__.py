"""Tables of the documents, filled from the JSON files of docs/results."""
