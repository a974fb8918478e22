"""The HTTP edge: requests are checked and named things resolved here; the engine knows neither."""
