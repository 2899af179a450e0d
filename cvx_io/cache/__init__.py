"""The feature cache on disk: items named by what they were made of, and lists of rows that refer to them.

    FOLDER/latent/3f/3f0c....safetensors         mean, std (C,T,h,w): the posterior of a clip, unscaled
    FOLDER/image_latent/...                      mean, std (C,1,h,w): that of a first frame
    FOLDER/text/...                              embeds (L,D), mask (L,): a caption, or what stands for none
    FOLDER/rows/NAME.jsonl                       a line for what all rows share, then a line a row
    FOLDER/digests.json                          digests of source files, by what the system says of them
    FOLDER/claims                                locked by the processes that work on items

An item's name is a digest of its ingredients, which its header holds too. So nothing is ever changed, two
processes that make the same item make the same file, and what a folder lacks is known without reading it.
"""
