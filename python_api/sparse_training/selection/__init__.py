"""Selection of the rows to train on: policies select, scorers score, ``registry`` makes both from names."""
