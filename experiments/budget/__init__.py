"""Safe defaults: what a person gets who gives nothing but a budget."""
