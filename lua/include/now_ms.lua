-- @include now_us
-- The time in whole milliseconds, the unit of every time that is stored, as the text that commands take.
local now_ms = now_us:sub(1, -4)
