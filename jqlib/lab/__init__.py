"""What runs the workbook and shows what it found."""
