"""What the reports of comparisons and of regressions share: the frame of a page, its pieces, plain text.

page   one HTML file with its pictures and scripts inside (extra `report`)
html   sections, tables that sort, places for pictures
text   markdown's and HTML's plain parts, files written whole
"""
