"""Tests of single rooms, without a server."""
