"""smol-moe: a small language model from a package, upcycled into a mixture of experts.

`python -m exports.smol.train` trains it and writes the differences between the experts;
`expertflow build smol-moe` puts them and the package together again.
"""
