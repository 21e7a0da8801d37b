"""What happens to the input of a site: the one object, the matrices and grids it is made of, and merging it."""
