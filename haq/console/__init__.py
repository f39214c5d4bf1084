"""What commands share on a terminal: errors in a sentence, progress, tables, options."""
