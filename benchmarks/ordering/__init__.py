"""What ordering sequences by their routes is worth, by the number that decode together."""
