-- The state of the stream of events: the id of its last entry, how many were ever added, how many of these are gone.
local function stream_state(events_key)
  local state = {last_id = '0-0', added = 0, gone = 0}
  if redis.call('EXISTS', events_key) == 1 then
    local about = redis.call('XINFO', 'STREAM', events_key)
    local values = {}
    for index = 1, #about, 2 do
      values[about[index]] = about[index + 1]
    end
    state.last_id, state.added = values['last-generated-id'], values['entries-added']
    state.gone = state.added - values['length']
  end
  return state
end
