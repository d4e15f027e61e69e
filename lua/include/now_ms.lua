-- @include clock
-- The time in whole milliseconds, the unit of every time that is stored, as the text that commands take.
local now_ms = clock[1] .. ('00000' .. clock[2]):sub(-6, -4)
