#!lua flags=no-writes
--[[
Read the events that come after a position in the stream, and tell whether any in between were lost: trimmed, or gone
with an earlier stream. Some may be lost if the entry at the position itself is gone, or if not as many come after it as
were added. At the id 0-0, where none is left or none was there yet, just as many must be gone.

KEYS  events
ARGV  after_id, after_number (how many entries were added up to after_id), limit,
      again ('' = the whole of after_id was seen, else it is read again)
Reply {1 when some were lost, id of the last entry, number of entries so far}, then id and message of each entry, which
      holds the events of one change (see publish); or, when some were lost, how many of the first entries are gone,
      and the id of the first that is left ('0-0' = none is)
Cost  O(limit)
]]
-- @include stream_state

local events_key = KEYS[1]
local after_id, after_number, limit, again = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4] or ''

local state = stream_state(events_key)
local is_lost
if after_id == '0-0' then
  is_lost = state.gone ~= after_number
else
  -- Without this entry, it may be another stream, of which as much was trimmed.
  is_lost = state.added < after_number or state.gone > after_number
    or #redis.call('XRANGE', events_key, after_id, after_id) == 0
end
local entries = {}
if not is_lost then
  local from = again == '' and '(' .. after_id or after_id
  entries = redis.call('XRANGE', events_key, from, '+', 'COUNT', limit)
  -- Another stream may have an entry of the same moment, but with another number.
  is_lost = #entries ~= math.min(limit, state.added - after_number + (again == '' and 0 or 1))
end
if is_lost then
  local first = redis.call('XRANGE', events_key, '-', '+', 'COUNT', 1)[1]
  return {1, state.last_id, state.added, state.gone, first and first[1] or '0-0'}
end
local reply = {0, state.last_id, state.added}
for _, entry in ipairs(entries) do
  reply[#reply + 1] = entry[1]
  reply[#reply + 1] = entry[2][2]
end
return reply
