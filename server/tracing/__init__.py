"""Spans for whoever runs the server, by OpenTelemetry, where its extra is there and OTEL_ variables ask for it."""
