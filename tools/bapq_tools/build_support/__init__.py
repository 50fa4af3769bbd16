"""Helpers of long host work: progress, worker processes, files for what memory cannot hold."""
