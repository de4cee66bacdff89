"""`spinquant demo`: the table, the pictures and the page."""
