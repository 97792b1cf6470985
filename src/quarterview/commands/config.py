"""The composed configuration of each command: which parts it is made of, and what it checks across them."""
