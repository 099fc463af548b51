"""Language: what a schedule may say, what it records, and how a recording is checked before it runs."""
