"""The networks of the repair benchmark: their architectures, their data, how they are trained, and the list of them."""
