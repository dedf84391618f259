"""The worth of ordering sequences by their routes, by the number that decode together."""
