"""The course and timelines as pages for a browser: plain files, no server, nothing fetched from anywhere."""
