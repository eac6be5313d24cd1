"""What hostile or unlucky callers do to a running server."""
