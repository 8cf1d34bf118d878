"""Records in, text out: the terminal, and one offline HTML file. Nothing here measures, decides or imports torch.

`terminal` gives rich renderables, `html` a complete page as a string, `svg` the hand-drawn charts, `words` the
sentences and numbers, `digest` what is picked out of a record before it is drawn.
"""
