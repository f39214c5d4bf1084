"""What a report is made of: charts, and the page around them."""
