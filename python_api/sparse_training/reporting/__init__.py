"""Reports: results read from files, and shown as tables, figures and pages."""
