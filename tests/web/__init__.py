"""The page, in a browser; and what it is built on, against the packages that it comes from."""
