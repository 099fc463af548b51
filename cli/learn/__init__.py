"""The course on a terminal: lessons drawn, read page by page, and questions answered."""
