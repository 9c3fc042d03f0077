"""What training says of itself: the metrics of an update (`monitor`), the checks before the first one (`preflight`),
and what it costs (`flops`)."""
