"""Which axes belong together, and the same program without some of them."""
