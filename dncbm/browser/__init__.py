"""The browser: a folder of pages that shows a run to people who have nothing but a web browser.

The modules compute what is shown; `site/` is copied as it is, and `types.d.ts` says what the two exchange. It imports
`runs` to `explain`.
"""
