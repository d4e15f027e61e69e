-- @include clock
-- The time in whole microseconds, as the text that commands take: joined, not computed, so that no number has to be
-- formatted.
local now_us = clock[1] .. (#clock[2] == 6 and clock[2] or ('00000' .. clock[2]):sub(-6))
