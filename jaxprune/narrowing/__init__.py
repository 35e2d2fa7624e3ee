"""`narrow`: the smaller program, from masks and the program at its full size."""

from jaxprune.narrowing._narrow import narrow as narrow
