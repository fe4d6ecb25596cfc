"""What is made of results: scores, tables, figures, pages."""
