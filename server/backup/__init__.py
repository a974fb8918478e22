"""Everything of a HOME that can't be made again, as one file, while servers and workers go on; and back again."""
