"""Several sources as one stream of rows: what each is, whose turn it is, and the rows."""
