"""The fastest whole run that keeps an error which the user names: few measured runs, a model of the rest."""
