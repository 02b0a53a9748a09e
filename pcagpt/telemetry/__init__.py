"""Progress bars, and the metrics that a run records while it trains."""
