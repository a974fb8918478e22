"""Who may do what, and how much of it: projects, their keys, limits, usage, and what operators did."""
