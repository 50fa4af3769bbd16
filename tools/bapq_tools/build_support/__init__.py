"""What long host work needs: progress, worker processes, files for what memory cannot hold."""
