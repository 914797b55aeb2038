"""Compare and verify files, and show results as text and pages."""
