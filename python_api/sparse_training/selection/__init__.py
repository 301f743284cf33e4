"""Which rows are trained on: policies choose, scorers judge, ``registry`` makes both from names."""
