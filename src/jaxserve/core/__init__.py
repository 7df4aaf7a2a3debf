"""The words of the house: frozen records, protocols and errors; standard library and numpy only."""
