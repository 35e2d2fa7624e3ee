"""Models that nobody here wrote, and whether the contract holds on them.

    python -m benchmarks.third_party

builds small models of other people's packages, cuts half of every exact group at random
and compares the narrowed model with the masked one. `docs/third_party.md` has the
results, and says how to install the packages.
"""
