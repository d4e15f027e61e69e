-- @include now_us
-- The server's clock in whole milliseconds, the unit of every time that is stored.
local function now_ms()
  return math.floor(now_us() / 1000)
end
