"""Trained public models, out of PyPI packages: what banks of them cover, take and answer."""
